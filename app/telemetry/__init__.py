"""What is told of the server's work: metrics, headers, log lines, timings, traces."""
