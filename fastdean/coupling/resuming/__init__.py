"""Jobs that go on after a kill."""
