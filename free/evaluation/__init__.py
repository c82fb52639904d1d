"""What samplers are worth: compared, judged by real data, reported."""
