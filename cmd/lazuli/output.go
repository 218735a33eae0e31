package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/term"
)

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// size writes bytes for people, with powers of ten as networks and disks are sold.
func size(n int64) string {
	f, unit := float64(n), "B"
	for _, u := range []string{"kB", "MB", "GB", "TB"} {
		if f < 1000 {
			break
		}
		f, unit = f/1000, u
	}
	if unit == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, unit)
}

// A counter shows on stderr how many bytes came: one line that is rewritten on a
// terminal, else a line every few seconds. It shows nothing before the first second is over.
type counter struct {
	n    atomic.Int64
	w    io.Writer
	tty  bool
	what string
	done chan struct{}
	idle chan struct{}
}

// count starts a counter; what is the beginning of its line. Its stop must be called.
func count(w io.Writer, what string) *counter {
	c := &counter{w: w, what: what, done: make(chan struct{}), idle: make(chan struct{})}
	if f, ok := w.(*os.File); ok {
		c.tty = term.IsTerminal(int(f.Fd()))
	}
	go c.show()
	return c
}

func (c *counter) add(n int64) { c.n.Add(n) }

func (c *counter) show() {
	defer close(c.idle)
	every := 5 * time.Second
	if c.tty {
		every = 250 * time.Millisecond
	}
	start := time.Now()
	t := time.NewTicker(every)
	defer t.Stop()
	shown := int64(0)
	for {
		select {
		case <-c.done:
			if c.tty && shown > 0 {
				fmt.Fprint(c.w, "\r\x1b[K")
			}
			return
		case <-t.C:
		}
		n, took := c.n.Load(), time.Since(start)
		if n == shown || took < time.Second {
			continue
		}
		shown = n
		line := fmt.Sprintf("%s: %s, %s/s", c.what, size(n), size(int64(float64(n)/took.Seconds())))
		if c.tty {
			fmt.Fprintf(c.w, "\r%s\x1b[K", line)
		} else {
			fmt.Fprintln(c.w, line)
		}
	}
}

func (c *counter) stop() {
	close(c.done)
	<-c.idle
}
