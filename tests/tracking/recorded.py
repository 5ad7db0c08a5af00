"""A tracker that keeps what it is told."""

from kd_ranker.tracking.tracker import Tracked, Tracker, TrackerOfRuns

TRACKED = Tracked(
    command="sweep",
    name="runs/small",
    id="0123456789ab",
    config={"train.steps": 20},
    runs={"aux": {"seed": 0}, "none/1": {"seed": 1}},
    is_part=False,
)


class Recorded(Tracker):
    def __init__(self):
        self.calls = []

    def start(self, tracked):
        self.calls.append(("start", tracked))

    def begin(self, folder, step):
        self.calls.append(("begin", folder.name, step))

    def write(self, step, scalars):
        self.calls.append(("write", step, dict(scalars)))

    def end(self):
        self.calls.append(("end",))

    def finish(self, results, files):
        self.calls.append(("finish", results, [(file.name, file.exists()) for file in files]))

    def close(self, is_finished):
        self.calls.append(("close", is_finished))

    def of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


class RecordedRuns(TrackerOfRuns):
    def __init__(self):
        self.calls = []

    def open_run(self, run):
        self.calls.append(("open", run, self.config_of(run)))

    def write_run(self, run, step, scalars):
        self.calls.append(("write", run, step, scalars))
