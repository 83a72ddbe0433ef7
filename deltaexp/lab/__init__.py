"""The lab: turns a composed config into a run. It imports the engine; the engine never imports the lab."""
