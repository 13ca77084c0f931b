"""The parts of a method (direction, schedule, descent, radius and samples), and what they see of a step."""
