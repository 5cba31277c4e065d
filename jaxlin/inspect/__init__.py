"""What a student's layers do: gates, memory, states and needles in them. `python -m jaxlin.inspect`."""
