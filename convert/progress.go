package convert

import (
	"sync"
	"time"
)

// A Progress is how far a conversion is. The zero value is ready. One goroutine may convert while
// others look.
type Progress struct {
	mu    sync.Mutex
	start time.Time
	s     Status
}

// A Status is a moment of a conversion.
type Status struct {
	Layers, LayersDone int
	// In is how many bytes of the source's layers are dealt with, of Total. What needs not be read because
	// it was converted before counts too. Read is how many were read.
	In, Total, Read int64
	// Out is how many bytes of converted layers there are.
	Out     int64
	Elapsed time.Duration
	// Rate is bytes of In per second, over all of Elapsed.
	Rate float64
	// Left is about how long the rest takes; 0 if that cannot be known yet.
	Left time.Duration
}

// Status returns how far the conversion is now.
func (p *Progress) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.s
	if p.start.IsZero() {
		return s
	}
	s.Elapsed = time.Since(p.start)
	if sec := s.Elapsed.Seconds(); sec > 0 {
		s.Rate = float64(s.Read) / sec
	}
	if s.Rate > 0 && s.Elapsed > time.Second {
		s.Left = time.Duration(float64(s.Total-s.In) / s.Rate * float64(time.Second))
	}
	return s
}

func (p *Progress) plan(size int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.start.IsZero() {
		p.start = time.Now()
	}
	p.s.Layers++
	p.s.Total += size
}

func (p *Progress) add(in, read int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.s.In += in
	p.s.Read += read
}

func (p *Progress) writing(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.s.Out += n
}

func (p *Progress) layerDone() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.s.LayersDone++
}

// reading counts what is read of one layer.
type reading struct {
	p *Progress
	n int64
}

func (r *reading) add(n int) {
	r.n += int64(n)
	r.p.add(int64(n), int64(n))
}

// skip counts the rest of a layer of size bytes, which is not read.
func (r *reading) skip(size int64) { r.p.add(size-r.n, 0) }
