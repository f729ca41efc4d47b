"""A program over many ranks: who holds what (layouts), who computes and sends what (schedules), and who carries it out."""
