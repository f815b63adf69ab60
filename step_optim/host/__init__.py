"""What torch and the other processes are told: hooks, wrapped modules, random streams, ranks. It knows torch alone."""
