package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A Partial is an object that is being fetched: chunks come in any order, and are read
// as soon as they are in. After the last one it is complete and published. What is in
// outlives the process.
//
// A Partial may be used by several goroutines.
type Partial struct {
	s    *Store
	key  Key
	f    *os.File
	bits *os.File        // the bitmap's file; nil if this process does not own the named partial
	name string          // where f lies until it is published
	in   []atomic.Uint64 // a bit per chunk

	mu      sync.Mutex // serialises marking, so that one caller sees the last chunk
	missing int        // chunks that are not in
}

// OpenPartial opens the object named key, of size bytes in n chunks, to be completed. If another process
// is at it, this one gets a file of its own: whoever is first publishes.
func (s *Store) OpenPartial(key Key, size int64, n int) (*Partial, error) {
	p := &Partial{s: s, key: key, in: make([]atomic.Uint64, (n+63)/64), missing: n}
	name := s.Path("partial", key.String())
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o444)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil || !sameFile(f, name) {
		f.Close()
		t, err := s.Create()
		if err != nil {
			return nil, err
		}
		p.f, p.name = t.f, t.name
	} else if err := p.load(f, name, n); err != nil {
		f.Close()
		return nil, fmt.Errorf("store: %w", err)
	}
	if err := p.f.Truncate(size); err != nil {
		p.Close()
		return nil, fmt.Errorf("store: %w", err)
	}
	return p, nil
}

// sameFile reports whether name still leads to f: its last owner may have published it
// between our open and our lock.
func sameFile(f *os.File, name string) bool {
	a, errA := f.Stat()
	b, errB := os.Stat(name)
	return errA == nil && errB == nil && os.SameFile(a, b)
}

// load reads which chunks of the partial are in already.
func (p *Partial) load(f *os.File, name string, n int) error {
	bits, err := os.OpenFile(name+".map", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	b := make([]byte, (n+7)/8)
	bits.ReadAt(b, 0) // a short file has zeros behind its end
	for i := range n {
		if b[i/8]&(1<<(i%8)) != 0 {
			p.in[i/64].Store(p.in[i/64].Load() | 1<<(i%64))
			p.missing--
		}
	}
	p.f, p.bits, p.name = f, bits, name
	if p.missing == 0 { // its owner died between the last chunk and the rename
		return p.publish()
	}
	return nil
}

// Has reports whether chunk i is in.
func (p *Partial) Has(i int) bool { return p.in[i/64].Load()&(1<<(i%64)) != 0 }

// ReadAt reads bytes of chunks that are in, as io.ReaderAt does. Of others it reads zeros.
func (p *Partial) ReadAt(b []byte, off int64) (int, error) { return p.f.ReadAt(b, off) }

// Put writes chunk i, whose bytes b belong at offset off of the object, and reports whether that
// made the object complete. The caller has checked b against the chunk's digest. A nil b is a hole.
func (p *Partial) Put(i int, b []byte, off int64) (complete bool, err error) {
	if p.Has(i) {
		return false, nil
	}
	if _, err := p.f.WriteAt(b, off); err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.Has(i) { // two readers of one chunk that is not single-flighted across processes or retries
		return false, nil
	}
	p.in[i/64].Or(1 << (i % 64))
	p.missing--
	p.s.dirty.Store(true)
	if p.missing == 0 {
		return true, p.publish()
	}
	if p.bits != nil {
		// The byte holds the bits of eight chunks; p.mu keeps their writers apart.
		byteOf := byte(p.in[i/64].Load() >> (i % 64 / 8 * 8))
		if _, err := p.bits.WriteAt([]byte{byteOf}, int64(i/8)); err != nil {
			return false, fmt.Errorf("store: %w", err)
		}
	}
	return false, nil
}

// publish gives the complete object its name.
func (p *Partial) publish() error {
	if err := os.Rename(p.name, filepath.Join(p.s.Objects(), p.key.Path())); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	p.s.dirty.Store(true)
	if p.bits != nil {
		os.Remove(p.name + ".map")
	}
	p.name = ""
	return nil
}

// Complete reports whether all chunks are in.
func (p *Partial) Complete() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.missing == 0
}

// Close releases the files. What is in stays.
func (p *Partial) Close() error {
	var err error
	if p.bits != nil {
		err = p.bits.Close()
	} else if p.name != "" {
		os.Remove(p.name)
	}
	return errors.Join(err, p.f.Close())
}
