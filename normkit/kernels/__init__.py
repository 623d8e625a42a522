"""Forms of a norm that are written for one kind of device."""
