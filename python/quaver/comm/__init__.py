"""Messages between ranks: the transport, what carries it, and the heartbeat."""
