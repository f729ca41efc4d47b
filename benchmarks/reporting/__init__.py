"""The report: suites of measurements, their tables and pictures.

jobs      one measurement in a process of its own
peers     other libraries, and the program that each of them claims to compute
suites    which measurements answer which question
running   run suites, resume them, write their records
cells     rows of the records, and figures as text
tables    the report's tables from the records
charts    line charts as SVG
page      Markdown and one HTML file

Imports run from the bottom of this list to its top.
"""
