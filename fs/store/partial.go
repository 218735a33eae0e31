package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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
	s     *Store
	key   Key
	f     *os.File
	marks *os.File        // the map's file; nil if this process does not own the named partial
	name  string          // where f lies until it is published
	in    []atomic.Uint64 // a bit per chunk

	mu      sync.Mutex   // serialises marking, so that one caller sees the last chunk
	mapped  int64        // chunks that the map's file names
	missing atomic.Int64 // chunks that are not in
}

// OpenPartial opens the object named key, of size bytes in n chunks, to be completed. If another process
// is at it, this one gets a file of its own: whoever is first publishes.
func (s *Store) OpenPartial(key Key, size int64, n int) (*Partial, error) {
	p := &Partial{s: s, key: key, in: make([]atomic.Uint64, (n+63)/64)}
	p.missing.Store(int64(n))
	name := s.Path("partial", key.String())
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
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
	if p.Complete() { // its owner died between the last chunk and the rename
		if err := p.publish(); err != nil {
			p.Close()
			return nil, err
		}
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
	st, err := f.Stat()
	if err != nil {
		return err
	}
	flags := os.O_CREATE | os.O_RDWR
	if st.Size() == 0 {
		// The file was made just now; a map that is there speaks of another one, which was published,
		// pruned, or lost in a power cut. Believing it would make holes into chunks that are in.
		flags |= os.O_TRUNC
	}
	m, err := os.OpenFile(name+".in", flags, 0o600)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(io.LimitReader(m, int64(n)*mapEntry))
	if err != nil {
		m.Close()
		return err
	}
	for ; len(b) >= mapEntry; b = b[mapEntry:] {
		p.mapped++
		if i := int(binary.LittleEndian.Uint32(b)); i < n && !p.Has(i) {
			p.in[i/64].Or(1 << (i % 64))
			p.missing.Add(-1)
		}
	}
	p.f, p.marks, p.name = f, m, name
	return nil
}

// The map is a list of the chunks that are in, as they came: 4 bytes each, little endian. It grows with each one, so that on
// the disk its content is never newer than its inode, whose time says after a power cut whether to believe it
// (Store.removeSince). A bit set in place may get there alone.
const mapEntry = 4

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
	defer p.s.dirty.Store(true)
	if p.missing.Add(-1) == 0 {
		return true, p.publish()
	}
	if p.marks != nil {
		entry := binary.LittleEndian.AppendUint32(nil, uint32(i))
		if _, err := p.marks.WriteAt(entry, p.mapped*mapEntry); err != nil {
			return false, fmt.Errorf("store: %w", err)
		}
		p.mapped++
	}
	return false, nil
}

// publish gives the complete object its name.
func (p *Partial) publish() error {
	if !p.s.Has(p.key) { // another process may have been faster
		if err := p.f.Chmod(0o444); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		if err := os.Rename(p.name, filepath.Join(p.s.Objects(), p.key.Path())); err != nil {
			return fmt.Errorf("store: %w", err)
		}
	} else {
		os.Remove(p.name)
	}
	if p.marks != nil {
		os.Remove(p.name + ".in")
	}
	p.name = ""
	return nil
}

// Complete reports whether all chunks are in.
func (p *Partial) Complete() bool { return p.missing.Load() == 0 }

// Close releases the files. What is in stays.
func (p *Partial) Close() error {
	var err error
	if p.marks != nil {
		err = p.marks.Close()
	} else if p.name != "" {
		os.Remove(p.name)
	}
	return errors.Join(err, p.f.Close())
}
