package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// A phase of a start. Each has ended at its mark.
type phase int

const (
	phaseResolve     phase = iota // the manifest is here
	phaseMetadata                 // and the tables of contents
	phaseMount                    // the root can be used
	phaseExec                     // the process runs
	phaseFirstOutput              // it wrote something
	phaseExit                     // it ended
	phases
)

var phaseNames = [phases]string{"resolve", "metadata", "mount", "exec", "first output", "exit"}

// A timeline is when each phase of a start ended.
type timeline struct {
	json  bool
	file  string // "" is stderr
	start time.Time

	mu    sync.Mutex
	marks [phases]time.Time
}

// newTimeline parses the flag's value; "" is no timeline, nil.
func newTimeline(flag string) (*timeline, error) {
	t := &timeline{start: time.Now()}
	switch {
	case flag == "":
		return nil, nil
	case flag == "text":
	case flag == "json":
		t.json = true
	case strings.HasPrefix(flag, "json:") && len(flag) > len("json:"):
		t.json, t.file = true, strings.TrimPrefix(flag, "json:")
	default:
		return nil, &usageError{fmt.Errorf("run: --timeline=%s: want text, json or json:FILE", flag)}
	}
	return t, nil
}

// mark notes the first end of a phase.
func (t *timeline) mark(p phase, at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.marks[p].IsZero() {
		t.marks[p] = at
	}
}

// output returns w, which marks the first output.
func (t *timeline) output(w io.Writer) io.Writer { return &markingWriter{t, w} }

type markingWriter struct {
	t *timeline
	w io.Writer
}

func (w *markingWriter) Write(b []byte) (int, error) {
	now := time.Now()
	w.t.mark(phaseExec, now) // who started it may hear of it later
	w.t.mark(phaseFirstOutput, now)
	return w.w.Write(b)
}

// print writes the timeline of what ran in m, which is closed.
func (t *timeline) print(stderr io.Writer, m *mounted, image string, code int) error {
	t.mark(phaseResolve, m.resolved)
	t.mark(phaseMetadata, m.parsed)
	t.mark(phaseMount, m.usable)
	network, fetched := m.stats()
	requests, arrived := network.Requests, network.Bytes
	type entry struct {
		Phase string  `json:"phase"`
		MS    float64 `json:"ms"`
	}
	report := struct {
		Image    string  `json:"image"`
		Digest   string  `json:"digest"`
		Phases   []entry `json:"phases"`       // milliseconds from the start of the program's work to the end of the phase
		Requests int64   `json:"requests"`     // of all kinds
		Fetched  int64   `json:"bytesFetched"` // with manifests and tables of contents
		Needed   int64   `json:"bytesNeeded"`  // of files, that a read waited for
		Misses   int64   `json:"misses"`       // reads that waited
		Exit     int     `json:"exitCode"`
	}{Image: image, Digest: m.digest, Requests: requests, Fetched: arrived, Needed: fetched.Needed, Misses: fetched.Misses, Exit: code}
	for p, at := range t.marks {
		if !at.IsZero() { // a process may write nothing
			report.Phases = append(report.Phases, entry{phaseNames[p], float64(at.Sub(t.start).Microseconds()) / 1000})
		}
	}
	var buf bytes.Buffer
	if t.json {
		if err := writeJSON(&buf, report); err != nil {
			return err
		}
	} else {
		before := 0.0
		for _, e := range report.Phases {
			fmt.Fprintf(&buf, "%-13s %9.1f ms  (+%.1f)\n", e.Phase, e.MS, e.MS-before)
			before = e.MS
		}
		fmt.Fprintf(&buf, "%d requests, %s fetched, %s needed by %d reads that waited\n",
			report.Requests, size(report.Fetched), size(report.Needed), report.Misses)
	}
	if t.file != "" {
		return os.WriteFile(t.file, buf.Bytes(), 0o644)
	}
	_, err := stderr.Write(buf.Bytes())
	return err
}
