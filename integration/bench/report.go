package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// A report collects runs, and writes the files of the results after each, so that those of a program that is stopped are there.
type report struct {
	plan    *plan
	systems []*system
	runs    []*Run
	total   int
	started time.Time
	took    map[string][]float64 // seconds of runs with everything around them, by link, mode and system
	last    time.Time
}

func newReport(p *plan, list []*system) (*report, error) {
	r := &report{plan: p, systems: list, started: time.Now(), took: map[string][]float64{}, last: time.Now()}
	for _, mode := range p.Modes {
		r.total += p.Runs * len(p.Images) * len(p.Links) * len(r.fitting(mode))
	}
	dir := filepath.Join(p.Out, "timelines")
	return r, errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755))
}

// fitting returns the systems that a mode makes sense for.
func (r *report) fitting(mode string) (list []*system) {
	for _, s := range r.systems {
		if s.fits(mode) {
			list = append(list, s)
		}
	}
	return list
}

// add takes note of a run.
func (r *report) add(run *Run, err error) error {
	if err != nil {
		return err
	}
	r.runs = append(r.runs, run)
	now := time.Now()
	key := run.Link + " " + run.Mode + " " + run.System
	r.took[key] = append(r.took[key], now.Sub(r.last).Seconds())
	r.last = now
	what := fmt.Sprintf("pull %.2f, first line %.2f, ready %.2f, exit %.2f s; %d requests, %.1f MB", run.Pull, run.First, run.Ready, run.Exit, len(run.Requests), mb(run.Bytes))
	if run.Void != "" {
		why, _, _ := strings.Cut(run.Void, "\n") // with logs after it, which are in bench.json
		what = "does not count: " + why
	}
	say("%d/%d  %s  %s  %s  %s: %s; %s", len(r.runs), r.total, run.Image, run.Link, run.Mode, run.System, what, r.remaining())
	count, void := r.of(image{Name: run.Image}, link{Name: run.Link}, run.Mode, run.System)
	return errors.Join(r.write(), run.writeTimeline(filepath.Join(r.plan.Out, "timelines"), len(count)+void))
}

// remaining says how long the rest will take: for what has been measured what it took, for the rest a guess, of an image of 300 MB.
func (r *report) remaining() string {
	var rest float64
	for _, l := range r.plan.Links {
		for _, mode := range r.plan.Modes {
			for _, s := range r.fitting(mode) {
				left := r.plan.Runs * len(r.plan.Images)
				took := r.took[l.Name+" "+mode+" "+s.Name]
				guess := guess(l, s)
				if len(took) > 0 {
					guess = median(took)
				}
				rest += guess * float64(left-len(took))
			}
			rest += 10 * float64(r.plan.Runs*len(r.plan.Images)) // for deleting what was
		}
	}
	left := r.total - len(r.runs)
	if left == 0 {
		return "that was the last"
	}
	return fmt.Sprintf("%.0f minutes are left, %.0f if all runs should reach the limit", rest/60+0.5, float64(left)*r.plan.Timeout.Minutes()+1)
}

func guess(l link, s *system) float64 {
	seconds := 8 + 100*l.RTT.Seconds() // the node, the job, round trips
	bytes := 60e6
	if s.whole {
		bytes, seconds = 300e6, 18
	}
	if l.Mbit > 0 {
		seconds += bytes * 8 / (l.Mbit * 1e6)
	}
	return seconds
}

func (r *report) write() error {
	b, err := json.MarshalIndent(struct {
		Started time.Time `json:"started"`
		Runs    []*Run    `json:"runs"`
	}{r.started, r.runs}, "", " ")
	if err != nil {
		return err
	}
	var text strings.Builder
	return errors.Join(
		replace(filepath.Join(r.plan.Out, "bench.json"), b),
		r.print(&text), replace(filepath.Join(r.plan.Out, "bench.txt"), []byte(text.String())),
		replace(filepath.Join(r.plan.Out, "bench.svg"), r.picture()))
}

func replace(name string, b []byte) error {
	if err := os.WriteFile(name+".new", b, 0o644); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// A column is a number of a run.
type column struct {
	title string
	of    func(*Run) float64 // less than zero is not known
	form  string
}

var columns = []column{
	{"pull s", func(r *Run) float64 { return known(r.Pull) }, "%.2f"},
	{"first line s", func(r *Run) float64 { return r.First }, "%.2f"},
	{"ready s", func(r *Run) float64 { return r.Ready }, "%.2f"},
	{"exit s", func(r *Run) float64 { return r.Exit }, "%.2f"},
	{"requests", func(r *Run) float64 { return float64(len(r.Requests)) }, "%.0f"},
	{"MB", func(r *Run) float64 { return mb(r.Bytes) }, "%.1f"},
	{"MB needed", func(r *Run) float64 { return mb(r.Needed) }, "%.1f"},
	{"CPU s", func(r *Run) float64 { return known(r.CPU) }, "%.2f"},
	{"without job", func(r *Run) float64 { return known(r.Overhead) }, "%.2f"},
	{"daemon MB", func(r *Run) float64 { return known(mb(r.Daemon)) }, "%.0f"},
	{"containerd MB", func(r *Run) float64 { return known(mb(r.Containerd)) }, "%.0f"},
}

// wrongColumns are of runs with wrong packs, in the mode for them.
var wrongColumns = []column{
	{"pack requests", ofWrong(func(u *wrongUse) float64 { return float64(u.Requests) }), "%.0f"},
	{"pack MB at exit", ofWrong(func(u *wrongUse) float64 { return mb(u.Ended) }), "%.1f"},
	{"pack MB", ofWrong(func(u *wrongUse) float64 { return mb(u.Bytes) }), "%.1f"},
	{"end after removal s", ofWrong(func(u *wrongUse) float64 { return u.Removed }), "%.2f"},
}

func ofWrong(number func(*wrongUse) float64) func(*Run) float64 {
	return func(r *Run) float64 {
		if r.Wrong == nil {
			return -1
		}
		return number(r.Wrong)
	}
}

// known returns what is not known for zero: the system has no such thing.
func known(f float64) float64 {
	if f == 0 {
		return -1
	}
	return f
}

func mb(bytes int64) float64 { return float64(bytes) / 1e6 }

// of returns the runs of a system that count, and how many do not.
func (r *report) of(im image, l link, mode, system string) (list []*Run, void int) {
	for _, run := range r.runs {
		if run.Image == im.Name && run.Link == l.Name && run.Mode == mode && run.System == system {
			if run.Void != "" {
				void++
			} else {
				list = append(list, run)
			}
		}
	}
	return list, void
}

// print writes a table for each image, link and mode, and then the goals.
func (r *report) print(out io.Writer) error {
	for _, im := range r.plan.Images {
		for _, l := range r.plan.Links {
			for _, mode := range r.plan.Modes {
				if err := r.table(out, im, l, mode); err != nil {
					return err
				}
			}
		}
	}
	for _, im := range r.plan.Images {
		for _, l := range r.plan.Links {
			if err := r.printGoals(out, im, l); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *report) table(out io.Writer, im image, l link, mode string) error {
	fmt.Fprintf(out, "%s, link %s, %s: median (least–most)\n", im.Name, l.Name, mode)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "system\truns")
	columns := columns
	if mode == wrong {
		columns = slices.Concat(columns, wrongColumns)
	}
	for _, c := range columns {
		fmt.Fprint(w, "\t", c.title)
	}
	fmt.Fprintln(w)
	for _, s := range r.fitting(mode) {
		list, void := r.of(im, l, mode, s.Name)
		fmt.Fprintf(w, "%s\t%d", s.Name, len(list))
		if void > 0 {
			fmt.Fprintf(w, ", %d void", void)
		}
		for _, c := range columns {
			fmt.Fprint(w, "\t", c.cell(list))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w)
	return w.Flush()
}

func (c column) cell(list []*Run) string {
	v := c.values(list)
	if len(v) == 0 || v[0] < 0 {
		return "–"
	}
	middle := fmt.Sprintf(c.form, median(v))
	least, most := fmt.Sprintf(c.form, v[0]), fmt.Sprintf(c.form, v[len(v)-1])
	if least == most {
		return middle
	}
	return fmt.Sprintf("%s (%s–%s)", middle, least, most)
}

// values returns the numbers of runs in order.
func (c column) values(list []*Run) []float64 {
	var v []float64
	for _, run := range list {
		v = append(v, c.of(run))
	}
	slices.Sort(v)
	return v
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}
