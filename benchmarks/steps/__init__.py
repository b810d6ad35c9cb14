"""Training steps of this project and its peers on one CPU: cases, both sides' programs, gate, page."""
