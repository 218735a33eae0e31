package profile

import (
	"math"
	"testing"
)

func shares(p *Profile) map[string]float64 {
	m := map[string]float64{}
	for _, x := range p.Pieces {
		m[x.Path] = math.Round(x.Share*1000) / 1000
	}
	return m
}

func TestLearn(t *testing.T) {
	old := &Profile{[]Piece{{"touched", 0, 0.6, 10}, {"hidden", 0, 0.5, 20}, {"missing", 0, 0.9, 30}, {"rare", 0, 0.06, 40}}}
	run := &Profile{[]Piece{{"new", 0, 1, 5}, {"touched", 0, 1, 40}}}
	got := Learn(old, run, func(x Piece) bool { return x.Path == "hidden" })
	want := map[string]float64{"touched": 0.733, "hidden": 0.5, "missing": 0.6, "new": 0.333}
	if have := shares(got); len(have) != len(want) {
		t.Errorf("%v, want %v", have, want)
	} else {
		for path, s := range want {
			if have[path] != s {
				t.Errorf("%s has a share of %v, want %v", path, have[path], s)
			}
		}
	}
	if got.Pieces[1].Path != "touched" && got.Pieces[1].MS != 20 {
		t.Errorf("second is %+v", got.Pieces[1])
	}
	// Nothing hidden: what is touched each time is certain, and the rest is forgotten.
	p := old
	for range 30 {
		p = Merge(p, run)
	}
	if have := shares(p); len(have) != 2 || have["new"] != 1 || have["touched"] != 1 {
		t.Errorf("after many runs: %v", have)
	}
}

func TestBound(t *testing.T) {
	p := &Profile{[]Piece{{"a", 0, 0.2, 1}, {"b", 0, 0.9, 2}, {"c", 0, 0.2, 3}, {"d", 0, 0.5, 4}}}
	got := p.Bound(3)
	if len(got.Pieces) != 3 || got.Pieces[0].Path != "a" || got.Pieces[1].Path != "b" || got.Pieces[2].Path != "d" {
		t.Errorf("%+v", got.Pieces)
	}
	if p.Bound(4) != p || len(p.Pieces) != 4 {
		t.Error("one that is small enough is changed")
	}
}
