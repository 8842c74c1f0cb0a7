"""The Flower engine: the same server and clients, with Flower carrying the bytes. Only here flwr is imported."""
