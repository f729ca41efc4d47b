"""The report: suites of measurements, their tables and pictures.

jobs      one measurement in a process of its own
peers     other libraries, and the program that each of them claims to compute
suites    which measurements answer which question
running   run suites, resume them, write their records
charts    line charts as SVG
cells     rows of the records, and figures as text
section   a heading, a text, a table, a chart
lengths   sections by length: time, memory, tokens a second
sizes     sections on limits of memory, rings, a billion tokens
comparisons
          sections on peers and dtypes, and what to use when
tables    all sections of a directory's records
page      Markdown and one HTML file

A module imports those above it.
"""
