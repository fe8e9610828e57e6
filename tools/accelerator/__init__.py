"""The parts of `bench_accelerator.py`: what each section measures, how its processes are run, and the table."""
