"""Load for a running server: requests at given times or from a given number of clients, and their latencies."""
