"""The delta types, one file each: a config dataclass and its torch module. `deltaexp.registry` finds them by itself."""
