"""Operations of the stand-in for the W&B server beyond runs: artifacts, sweeps, saved workspaces."""

import json
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import yaml

Variables = dict[str, Any]
PROJECT = {"id": "p", "internalId": "cDox", "name": "stand-in", "entity": {"id": "e", "name": "stand-in"}}


@dataclass
class StoredArtifact:
    """What the server has of one artifact."""

    id: str
    name: str
    type: str
    run: str
    metadata: str | None
    used_by: list[str] = field(default_factory=list)
    """Runs that have it as an input."""
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False

    def fields(self) -> dict[str, Any]:
        """As GraphQL's ArtifactFragment."""
        sequence = {"__typename": "ArtifactSequence", "name": self.name, "project": PROJECT, "latestArtifact": None}
        return {
            "__typename": "Artifact",
            "id": self.id,
            "artifactSequence": sequence,
            "versionIndex": 0,
            "artifactType": {"name": self.type},
            "description": None,
            "metadata": self.metadata,
            "ttlDurationSeconds": -1,
            "ttlIsInherited": False,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED" if self.committed else "PENDING",
            "size": sum(map(len, self.files.values())),
            "digest": "digest",
            "commitHash": None,
            "fileCount": len(self.files),
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": [],
        }


class ArtifactOperations:
    """`artifacts` by id."""

    def __init__(self):
        self.artifacts: dict[str, StoredArtifact] = {}

    def _CreateArtifact(self, variables: Variables) -> dict[str, Any]:  # noqa: N802 - GraphQL's names
        given = variables["input"]
        new = StoredArtifact(
            f"artifact{len(self.artifacts)}",
            given["artifactCollectionName"],
            given["artifactTypeName"],
            given["runName"],
            given.get("metadata"),
        )
        self.artifacts[new.id] = new
        return {"createArtifact": {"artifact": new.fields()}}

    def _CreateArtifactManifest(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        artifact = variables["artifactID"]
        file = {"id": "f", "uploadUrl": f"{self.url}/artifact/{artifact}/{variables['name']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifact, "file": file}}}

    def _UpdateArtifactManifest(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        artifact = variables["artifactManifestID"]
        file = {"id": "f", "uploadUrl": f"{self.url}/artifact/{artifact}/wandb_manifest.json", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": artifact, "file": file}}}

    def _CreateArtifactFiles(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        edges = []
        for spec in variables["input"]["artifactFiles"]:
            artifact, name = spec["artifactID"], spec["name"]
            url = f"{self.url}/artifact/{artifact}/{name}"
            node = {"storagePath": name, "uploadUrl": url, "uploadHeaders": [], "artifact": {"id": artifact}}
            edges.append({"node": node | {"uploadMultipartUrls": None}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        artifact = self.artifacts[variables["artifactID"]]
        artifact.committed = True
        return {"commitArtifact": {"artifact": artifact.fields()}}

    def _UseArtifact(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        given = variables["input"]
        self.artifacts[given["artifactID"]].used_by.append(given["runName"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def _ArtifactByID(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        return {"artifact": self.artifacts[variables["id"]].fields()}


class SweepOperations:
    """One sweep, a grid, whose trials one agent runs one after the other.

    `shortened`: settings by which each trial takes seconds; the server's answer adds them to the grid's own.
    """

    def __init__(self):
        self.sweep: dict[str, Any] = {}
        self.shortened: dict[str, Any] = {}
        self.trials: dict[str, dict[str, Any]] = {}
        """Settings by run id, as the agents got them."""
        self._left: list[dict[str, Any]] = []

    def _UpsertSweep(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        self.sweep = yaml.safe_load(variables["config"])
        assert self.sweep["method"] == "grid"
        axes = {
            key: given["values"] if "values" in given else [given["value"]]
            for key, given in self.sweep["parameters"].items()
        }
        self._left = [dict(zip(axes, point, strict=True)) for point in product(*axes.values())]
        sweep = {"name": "sweep1", "project": PROJECT | {"name": variables["projectName"]}}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _SweepWithRuns(self, _: Variables) -> dict[str, Any]:  # noqa: N802
        return {"project": {"sweep": {"id": "s", "config": yaml.safe_dump(self.sweep), "runs": {"edges": []}}}}

    def _CreateAgent(self, _: Variables) -> dict[str, Any]:  # noqa: N802
        return {"createAgent": {"agent": {"id": "agent1"}}}

    def _Heartbeat(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        if json.loads(variables["runState"]):
            command = []
        elif self._left:
            run_id, point = f"trial{len(self.trials)}", self._left.pop(0) | self.shortened
            self.trials[run_id] = point
            arguments = {key: {"value": value} for key, value in point.items()}
            command = [{"type": "run", "run_id": run_id, "program": self.sweep["program"], "args": arguments}]
        else:
            command = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(command)}}


class WorkspaceOperations:
    """Saved workspaces of the project stand-in, by W&B's name of the view; there is no other project."""

    def __init__(self):
        self.views: dict[str, dict[str, Any]] = {}
        self.saves = 0

    def _GetDefaultEntity(self, _: Variables) -> dict[str, Any]:  # noqa: N802
        return {"viewer": {"id": "v", "entity": "stand-in"}}

    def _View(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        if variables["projectName"] != "stand-in" or variables["entityName"] != "stand-in":
            return {"project": None}
        found = [view for name, view in self.views.items() if name == variables["viewName"]]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}

    def _UpsertView2(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        name, new = variables["name"], variables["name"] not in self.views
        assert new or variables["id"] == self.views[name]["id"], "a second view of the same name"
        view = {"id": f"view-{name}", "name": name, "displayName": variables["displayName"], "spec": variables["spec"]}
        self.views[name] = view
        self.saves += 1
        return {"upsertView": {"view": {"id": view["id"], "name": name}, "inserted": new}}
