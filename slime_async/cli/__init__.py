"""The composition root: commands and launchers. Roles are imported lazily, inside the command that runs them."""
