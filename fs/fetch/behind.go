package fetch

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"sync"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// Behind returns blob for who reads all of it while nobody waits: each range is a request like a fill's, of which no byte is taken from
// the link while a demand read waits or a startup pack arrives.
func (q *Queue) Behind(blob Blob) Blob { return behind{q, blob} }

type behind struct {
	q    *Queue
	blob Blob
}

func (b behind) Range(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	r := &run{priority: background} // which nobody promotes: what it brings is nobody's flight
	slot, err := b.q.slot(ctx, r)
	if err != nil {
		return nil, err
	}
	free := sync.OnceFunc(func() { <-slot })
	if err = b.q.yield(ctx, r); err == nil {
		var body *body
		if body, err = b.q.stream(ctx, r, b.blob, off, n); err == nil {
			return &slotted{body, free}, nil
		}
	}
	free()
	return nil, err
}

// A slotted is a stream that gives its slot back.
type slotted struct {
	io.ReadCloser
	free func()
}

func (s *slotted) Close() error {
	defer s.free()
	return s.ReadCloser.Close()
}

// Lacks reports whether chunk i of the object named key, which one of the layers has, is not in the store.
func (q *Queue) Lacks(key store.Key, i int) bool {
	if q.store.Has(key) {
		return false
	}
	o, err := q.Open(id(key))
	if err != nil {
		return false // nobody has the object any more
	}
	defer o.Close()
	return o.key == key && !o.has(i)
}

// Offer puts p into the store if it is chunk i of the object named key, for who comes by it in another way than by fetching members. It returns the
// digest of p. The error says why the store has not got it: it is another chunk, no layer has the object, or the store does not grow.
func (q *Queue) Offer(key store.Key, i int, p []byte) (toc.Digest, error) {
	sum := toc.Digest(sha256.Sum256(p))
	o, err := q.Open(id(key))
	if err != nil {
		return sum, err
	}
	defer o.Close()
	t := o.table()
	if o.key != key || i < 0 || i >= t.NumChunks() {
		return sum, fmt.Errorf("object %v has no chunk %d", key, i)
	}
	if c, _ := t.Chunk(i); c.Hole || c.Digest != sum {
		return sum, fmt.Errorf("object %v: chunk %d is not %v", key, i, sum)
	}
	if err := o.put(i, p); err != nil {
		q.fullStore(err)
		return sum, err
	}
	return sum, nil
}
