"""What a student's layers do: gates, memory, states and needles in them. `python -m jaxlin.inspect`."""

if __name__ == "inspect":  # jaxlin/ itself is searched, and this found before the standard library's
    raise SystemExit("run python -m jaxlin.NAME, not python jaxlin/NAME.py")
