"""Real deployment: what runs at the server and at each site, and how it is started."""
