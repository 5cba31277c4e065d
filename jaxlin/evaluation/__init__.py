"""Measuring a student against its teacher."""
