package main

import (
	"bytes"
	"fmt"
	"math"
)

// Sizes in pixels.
const (
	pictureWidth = 860
	nameWidth    = 110
	barHeight    = 18
	barGap       = 8
	panelHead    = 34
	panelFoot    = 30
)

// phases are the parts of a bar.
var phases = []struct {
	title, color string
	until        func(*Run) float64
}{
	{"pull", "#9db4d0", func(r *Run) float64 { return r.Pull }},
	{"until ready", "#2f5fa5", func(r *Run) float64 { return r.Ready }},
	{"until exit", "#d9a441", func(r *Run) float64 { return r.Exit }},
}

// picture draws, for each image, link and mode, a bar for each system: medians of when the phases ended, and a line from the least to the most of
// "ready".
func (r *report) picture() []byte {
	var b bytes.Buffer
	y := 30.0
	for i, p := range phases {
		x := nameWidth + float64(i)*120
		fmt.Fprintf(&b, `<rect x="%.0f" y="12" width="12" height="12" fill="%s"/><text x="%.0f" y="22">%s</text>`+"\n", x, p.color, x+18, p.title)
	}
	for _, im := range r.plan.Images {
		for _, l := range r.plan.Links {
			for _, mode := range r.plan.Modes {
				y = r.panel(&b, y, im, l, mode)
			}
		}
	}
	return fmt.Appendf(nil, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%.0f" font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="#fff"/>
%s</svg>
`, pictureWidth, y+10, b.Bytes())
}

// panel draws the bars of a link below y and returns where the next may begin.
func (r *report) panel(b *bytes.Buffer, y float64, im image, l link, mode string) float64 {
	most := 0.0
	systems := r.fitting(mode)
	for _, s := range systems {
		list, _ := r.of(im, l, mode, s.Name)
		for _, run := range list {
			most = max(most, run.Exit)
		}
	}
	fmt.Fprintf(b, `<text x="%d" y="%.0f" font-weight="bold">%s, link %s, %s</text>`+"\n", nameWidth, y+panelHead-12, im.Name, l.Name, mode)
	y += panelHead
	if most == 0 {
		return y
	}
	step := tick(most)
	scale := (pictureWidth - nameWidth - 60) / most
	bottom := y + float64(len(systems))*(barHeight+barGap)
	for i := 0; float64(i)*step <= most; i++ {
		x := nameWidth + float64(i)*step*scale
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.0f" x2="%.1f" y2="%.0f" stroke="#ddd"/><text x="%.1f" y="%.0f" text-anchor="middle" fill="#666">%g s</text>`+"\n",
			x, y-4, x, bottom, x, bottom+14, float64(i)*step)
	}
	for _, s := range systems {
		list, void := r.of(im, l, mode, s.Name)
		fmt.Fprintf(b, `<text x="%d" y="%.0f" text-anchor="end">%s</text>`+"\n", nameWidth-8, y+barHeight-5, s.Name)
		if len(list) == 0 {
			note := "not yet"
			if void > 0 {
				note = "no run counts"
			}
			fmt.Fprintf(b, `<text x="%d" y="%.0f" fill="#666">%s</text>`+"\n", nameWidth+4, y+barHeight-5, note)
			y += barHeight + barGap
			continue
		}
		from := 0.0
		for _, p := range phases {
			until := median(column{of: p.until}.values(list))
			fmt.Fprintf(b, `<rect x="%.1f" y="%.0f" width="%.1f" height="%d" fill="%s"/>`+"\n", nameWidth+from*scale, y, max(0, until-from)*scale, barHeight, p.color)
			from = max(from, until)
		}
		ready := column{of: func(r *Run) float64 { return r.Ready }}.values(list)
		middle := y + barHeight/2
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#000"/>`+"\n", nameWidth+ready[0]*scale, middle, nameWidth+ready[len(ready)-1]*scale, middle)
		fmt.Fprintf(b, `<text x="%.1f" y="%.0f">%.2f</text>`+"\n", nameWidth+from*scale+6, y+barHeight-5, median(ready))
		y += barHeight + barGap
	}
	return bottom + panelFoot
}

// tick returns a round number of which there are five to ten in most.
func tick(most float64) float64 {
	unit := math.Pow(10, math.Floor(math.Log10(most/5)))
	for _, f := range []float64{5, 2} {
		if most/(unit*f) >= 5 {
			return unit * f
		}
	}
	return unit
}
