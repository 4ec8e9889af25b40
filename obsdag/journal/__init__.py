"""The journal: accepted work that survives a crash (`ExecutorConfig(journal=SQLiteJournal("orders.db"))`).

The way of one effect: a fact of the core -> `Recorder` (which contexts it touched, their data at that moment) -> one
unit of rows per turn of the event loop, or of several while the writer is busy -> `Writer` (a thread; groups of whole
units) -> `Store` (the one connection) -> commit -> what waits for it leaves the engine: tickets, outputs, results.
After a crash `recover` reads the rows and `core.restoring` puts the contexts into a new run.

    codec       a context's data and progress as bytes and back, exactly or not at all
    schema      tables, version, migrations
    access      who may write the file, who has it open
    store       one SQLite file, opened so that nothing is lost, errors in one line
    writer      the thread that owns it
    recorder    the observer that writes down what happened
    entries     what is known of a context, and its row
    recover     rows as contexts again; a changed DAG
    journal     `SQLiteJournal`, which holds these together
"""

from obsdag.journal.journal import SQLiteJournal

__all__ = ["SQLiteJournal"]
