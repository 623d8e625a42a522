"""Statistics pooled over several processes, each with two devices."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest
from tiers import second_tier

WORKER = pathlib.Path(__file__).with_name('worker.py')
TIMEOUT_SECONDS = 120


def free_address() -> str:
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{server.getsockname()[1]}'


@pytest.mark.parametrize('count', [2, second_tier(4)])
def test_processes_agree_with_one(count, tmp_path):
  address = free_address()
  reports = [tmp_path / f'{index}.json' for index in range(count)]
  processes = [
    subprocess.Popen(
      [sys.executable, WORKER, str(index), str(count), address, report],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index, report in enumerate(reports)
  ]
  try:
    logs = [p.communicate(timeout=TIMEOUT_SECONDS)[1] for p in processes]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  for process, log, report in zip(processes, logs, reports, strict=True):
    assert process.returncode == 0, log[-2000:]
    found = json.loads(report.read_text())
    assert [*found] == ['jit', 'shard_map']
    for error, spread, devices in found.values():
      assert error < 1e-5
      assert spread < 1e-5
      assert devices == 2 * count
