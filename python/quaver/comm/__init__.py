"""Messages between ranks: the transport, its backends, and the heartbeat."""
