"""Compare label maps with references: overlap, surface distances, statistics, tables, results."""
