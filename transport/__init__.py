"""What crosses process borders: wire codec, ZeroMQ streams, the hub's server, weight broadcast groups."""
