"""Weights in and out: key tables, readers and writers of files, whole pipeline folders, and loading to a mesh."""


def load_sharded(*args, **kwargs):
    """Returns a part's parameters on a mesh, see `hybrid_dit.convert.mesh.load_sharded`."""
    from hybrid_dit.convert import mesh  # here, since the mesh's sharding rules use this package's tables

    return mesh.load_sharded(*args, **kwargs)
