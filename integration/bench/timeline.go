package main

import (
	"cmp"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

// writeTimeline writes what happened in a run, which is the nth of its kind, to a file in dir.
func (r *Run) writeTimeline(dir string, n int) error {
	type line struct {
		at   float64
		text string
	}
	var list []line
	for _, q := range r.Requests {
		list = append(list, line{q.Begin, fmt.Sprintf("%s\t%s\t%.3f\t%s", seconds(q.First), seconds(q.End), mb(q.Bytes), q.short())})
	}
	for _, m := range slices.Concat(r.Phases, []mark{{"pulled", r.Pull}, {"first line", r.First}, {"ready", r.Ready}, {"exit", r.Exit}}) {
		if m.At > 0 {
			list = append(list, line{m.At, "\t\t\t— " + m.What})
		}
	}
	slices.SortStableFunc(list, func(a, b line) int { return cmp.Compare(a.at, b.at) })
	var b strings.Builder
	fmt.Fprintf(&b, "%s, link %s, %s, %s, run %d: seconds since the start, as seen at the registry\n", r.Image, r.Link, r.Mode, r.System, n)
	if r.Void != "" {
		fmt.Fprintf(&b, "does not count: %s\n", r.Void)
	}
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "begin\tfirst\tend\tMB\twhat")
	for _, l := range list {
		fmt.Fprintf(w, "%.3f\t%s\n", l.at, l.text)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	name := fmt.Sprintf("%s_%s_%s_%s_%d.txt", r.Image, r.Link, r.Mode, r.System, n)
	return os.WriteFile(filepath.Join(dir, name), []byte(b.String()), 0o644)
}

// seconds returns a time, or that it has not come.
func seconds(at float64) string {
	if at == 0 {
		return "–"
	}
	return fmt.Sprintf("%.3f", at)
}

// short returns a request in few letters.
func (q *request) short() string {
	kind, name := path.Base(path.Dir(q.Path)), path.Base(q.Path)
	if hash, ok := strings.CutPrefix(name, "sha256:"); ok {
		name = hash[:min(len(hash), 8)]
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s %.24s %d %s", q.Method, kind, name, q.Status, strings.TrimPrefix(q.Range, "bytes=")))
}
