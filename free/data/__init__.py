"""Data that training, evaluation and the demo share: the digits with their DiT, photographs, image folders."""
