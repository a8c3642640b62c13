"""The report of runs and exports: reading them, drawing curves and tables, and the page that holds all."""
