"""Model → targets: the mesh, the module on meta, the memory its shards get, and which boxes of which FQN they are."""
