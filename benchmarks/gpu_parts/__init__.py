"""The parts of `python -m benchmarks.gpu`, which need no Ray: each measures one thing on one device and writes down what it found."""
