"""Checks that a wheel holds the package normkit and its metadata alone."""

import re
import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
stray = [n for n in names if not re.match(r'normkit(-[\d.]+\.dist-info)?/', n)]
wanted = 'normkit/__init__.py', 'normkit/py.typed', 'normkit/norms/batch.py'
missing = [n for n in wanted if n not in names]
if stray or missing:
  sys.exit(f'the wheel holds {stray} and lacks {missing}')
print(f'the wheel holds normkit alone, {len(names)} files')
