"""The report for people: one HTML file that shows what was done to a model, and needs no network."""

from effic.report.job import ReportWritten as ReportWritten
from effic.report.job import report as report
from effic.report.job import report_run as report_run
