package main

import (
	"fmt"
	"io"
	"math"
	"runtime"
	"text/tabwriter"
)

// figures are medians of an image over a link.
type figures struct {
	r    *report
	im   image
	l    link
	void bool // a system was measured, and no run of it counts
}

// of returns the median of a number, which is not a number if it was not measured.
func (f *figures) of(mode, system string, number func(*Run) float64) float64 {
	list, void := f.r.of(f.im, f.l, mode, system)
	if len(list) == 0 {
		f.void = f.void || void > 0
		return math.NaN()
	}
	return median(column{of: number}.values(list))
}

func (f *figures) ready(mode, system string) float64 {
	return f.of(mode, system, func(r *Run) float64 { return r.Ready })
}

// A goal is a number that is to be at most so large.
type goal struct {
	what   string
	most   float64
	number func(*figures) float64
}

var goals = append([]goal{
	faster(cold, "lazuli-pack", "stargz-opt", 0.5),
	{"cold: ready, lazuli-run-pack / (1.15 floor + 0.15 s)", 1, func(f *figures) float64 {
		return f.ready(cold, "lazuli-run-pack") / (1.15*f.ready(cold, "floor") + 0.15)
	}},
	faster(cold, "lazuli", "stargz", 1.0/3),
	faster(cold, "lazuli", "overlayfs", 1),
	faster(cold, "lazuli-rebuilt", "lazuli-pack", 1.2),
	{"cold: lazuli-pack, all bytes fetched / bytes of a pack of another recording of the job", 1.3, func(f *figures) float64 {
		return f.of(cold, "lazuli-pack", func(r *Run) float64 { return float64(r.Bytes) / float64(r.Pack.Needed) })
	}},
	{"cold: lazuli-pack, chunks missed / chunks in the pack, if all that came beside it were missed", 0.02, func(f *figures) float64 {
		return f.of(cold, "lazuli-pack", func(r *Run) float64 { return float64(r.Pack.Beside) / float64(r.Pack.Chunks) })
	}},
	faster(read+"100", "lazuli", "overlayfs", 1.1),
	faster(second, "lazuli", "overlayfs", 1.05),
	faster(second, "lazuli-pack", "overlayfs", 1.05),
	crowd("lazuli"),
	crowd("lazuli-pack"),
}, wrongGoals()...)

// faster compares the times of READY of two systems.
func faster(mode, system, other string, most float64) goal {
	return goal{fmt.Sprintf("%s: ready, %s / %s", mode, system, other), most, func(f *figures) float64 { return f.ready(mode, system) / f.ready(mode, other) }}
}

// wrongGoals hold starts with wrong packs against those without one, and what a node fetches of a wrong pack against what it may: a frame is fetched
// if half of it is new and of the image.
func wrongGoals() (list []goal) {
	none := wrong + "-" + wrongPacks[0].kind
	for _, p := range wrongPacks[1:] {
		system := wrong + "-" + p.kind
		list = append(list, faster(wrong, system, none, 1.2),
			goal{fmt.Sprintf("%s: %s, bytes of the pack / bytes of the image's files", wrong, system), 2, func(f *figures) float64 {
				return f.of(wrong, system, func(r *Run) float64 { return float64(r.Wrong.Bytes) / float64(r.Wrong.Content) })
			}})
	}
	return list
}

// crowd holds the last of twenty jobs against one, and what the processors have to do in the containers.
func crowd(system string) goal {
	what := fmt.Sprintf("%s: last ready, %s / (1.5 cold + the jobs' CPU time / %d processors)", twenty, system, runtime.NumCPU())
	return goal{what, 1, func(f *figures) float64 {
		jobs := f.of(twenty, system, func(r *Run) float64 { return r.CPU - r.Overhead }) / float64(runtime.NumCPU())
		return f.ready(twenty, system) / (1.5*f.ready(cold, system) + jobs)
	}}
}

// printGoals writes those goals for which all that they need was measured.
func (r *report) printGoals(out io.Writer, im image, l link) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "%s, link %s, goals\tis\tat most\t\n", im.Name, l.Name)
	for _, g := range goals {
		f := &figures{r: r, im: im, l: l}
		is := g.number(f)
		switch {
		case f.void:
			fmt.Fprintf(w, "%s\t–\t%.2f\tno run counts\n", g.what, g.most)
		case math.IsNaN(is):
		case is <= g.most:
			fmt.Fprintf(w, "%s\t%.3f\t%.2f\tok\n", g.what, is, g.most)
		default:
			fmt.Fprintf(w, "%s\t%.3f\t%.2f\tmissed\n", g.what, is, g.most)
		}
	}
	fmt.Fprintln(w)
	return w.Flush()
}
