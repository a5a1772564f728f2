"""Inside `shard_map`: what kind of device runs the program, which may be compiled for a machine that is not here."""

import jax


def manual_device() -> jax.sharding.AbstractDevice | None:
    """Returns the kind of device (platform, device_kind) while code inside `shard_map` is traced, elsewhere None.

    None, too, where `shard_map` leaves an axis of the mesh to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = mesh.axis_names and set(mesh.axis_names) == set(mesh.manual_axes)
    return mesh.abstract_device if manual else None
