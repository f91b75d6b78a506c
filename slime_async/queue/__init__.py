"""The staleness-bounded queue as a pure state machine: no I/O, no clock of its own."""
