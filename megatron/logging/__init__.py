"""What a run reports: log lines, progress, throughput, metric writers."""
