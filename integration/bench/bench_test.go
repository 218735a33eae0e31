package main

import (
	"encoding/binary"
	"strings"
	"testing"
	"time"
)

func TestParseLink(t *testing.T) {
	for s, want := range map[string]link{
		"bare":      {Name: "bare"},
		"20ms,1000": {"20ms,1000", 20 * time.Millisecond, 1000},
		"0s,2.5":    {"0s,2.5", 0, 2.5},
	} {
		if got, err := parseLink(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "20,1000", "20ms", "20ms,-1", "-1ms,5", "20ms,1000,3"} {
		if l, err := parseLink(s); err == nil {
			t.Errorf("%q: %+v", s, l)
		}
	}
}

// TestOnWire: 64 KiB that the kernel hands over at once take as long as the segments that they stand for.
func TestOnWire(t *testing.T) {
	packet := func(size, segment int) []byte {
		b := make([]byte, offloadHeader+size)
		if segment > 0 {
			b[1] = 1
			binary.NativeEndian.PutUint16(b[4:], uint16(segment))
		}
		return b
	}
	if got, want := onWire(packet(ipAndTCP+10*1448, 1448)), 10*(ethernet+ipAndTCP+1448); got != want {
		t.Errorf("ten segments: %d bytes, want %d", got, want)
	}
	if got, want := onWire(packet(ipAndTCP+1448+1, 1448)), 2*(ethernet+ipAndTCP)+1449; got != want {
		t.Errorf("a segment and a byte: %d bytes, want %d", got, want)
	}
	if got, want := onWire(packet(ipAndTCP, 0)), ethernet+ipAndTCP; got != want {
		t.Errorf("an acknowledgement: %d bytes, want %d", got, want)
	}
}

// TestLineClock: lines count when their ends come, in whatever pieces.
func TestLineClock(t *testing.T) {
	c := &lineClock{ready: "READY"}
	for _, step := range []struct {
		text               string
		first, ready, done bool
	}{
		{"STA", false, false, false},
		{"RT not READY\nREA", true, false, false},
		{"DY 1\nDO", true, true, false},
		{"NE\n", true, true, true},
	} {
		if n, err := c.Write([]byte(step.text)); n != len(step.text) || err != nil {
			t.Fatal(n, err)
		}
		if !c.first.IsZero() != step.first || !c.readyAt.IsZero() != step.ready || c.done != step.done {
			t.Errorf("after %q: %+v", step.text, c)
		}
	}
}

// TestReport: runs that do not count are said to exist, and are in no number.
func TestReport(t *testing.T) {
	p := &plan{Images: []image{{Name: "py"}}, Links: []link{{Name: "bare"}}, Runs: 4, Modes: []string{cold}, Out: t.TempDir()}
	r, err := newReport(p, []*system{systemOf("lazuli"), systemOf("stargz"), systemOf("overlayfs")})
	if err != nil {
		t.Fatal(err)
	}
	for _, ready := range []float64{4, 2, 3} {
		if err := r.add(&Run{Image: "py", Link: "bare", Mode: cold, System: "lazuli", Ready: ready, Exit: 5}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, run := range []*Run{
		{System: "lazuli", Ready: 77, Void: "not cold"},
		{System: "stargz", Ready: 6},
		{System: "overlayfs", Ready: 88, Void: "it took longer"},
	} {
		run.Image, run.Link, run.Mode = "py", "bare", cold
		if err := r.add(run, nil); err != nil {
			t.Fatal(err)
		}
	}
	var text strings.Builder
	if err := r.print(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"3, 1 void", "3.00 (2.00–4.00)", "0.50", "missed\n", "no run counts"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
	if picture := string(r.picture()); strings.Contains(text.String(), "77") || !strings.Contains(picture, ">3.00<") {
		t.Errorf("%s\n%s", text.String(), picture)
	}
}
