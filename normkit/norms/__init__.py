"""One file a norm: its state, its pure function, its transform."""
