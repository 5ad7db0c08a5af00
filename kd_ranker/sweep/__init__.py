"""Many students in one program under one teacher pass."""
