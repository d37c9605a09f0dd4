"""Episodes of control loops that are no environments of RLlib: clients, connected by sockets."""
