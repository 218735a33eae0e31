package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"
)

// body is the stream of one range. It ends after left bytes, and fails when nothing arrives
// for too long; time that the reader takes between reads does not count.
type body struct {
	rc     io.ReadCloser
	left   int64
	idle   time.Duration
	ctx    context.Context         // of the request
	cancel context.CancelCauseFunc // of ctx
	blob   *registryBlob           // nil for a manifest
	from   *endpoint               // of the blob
	first  []byte                  // read by open, not yet by the reader
	buf    [512]byte
	timer  *time.Timer // runs while the network is read
	stall  atomic.Bool // timer fired
	ended  bool        // the other side ended the stream before left was 0
	err    error
}

// open makes the stream begin at offset off of the blob, as the response permits, and waits for its
// first bytes: until those are here, the request may be made again.
func (b *body) open(resp *http.Response, off int64) error {
	if resp.StatusCode == http.StatusPartialContent {
		if err := checkContentRange(resp.Header.Get("Content-Range"), off, b.left, b.blob.size); err != nil {
			return err
		}
	} else {
		if off > maxSkip {
			return fmt.Errorf("%s: %w: it sent the whole blob where bytes from %d on were asked for; convert and mount from a registry that supports them", resp.Request.URL.Host, ErrNoRanges, off)
		}
		if resp.ContentLength >= 0 && resp.ContentLength != b.blob.size {
			return fmt.Errorf("the server has %d bytes of it, and the manifest says %d: push the image again", resp.ContentLength, b.blob.size)
		}
		n := b.left
		b.left = off
		if _, err := io.Copy(io.Discard, b); err != nil {
			return &transient{err: err}
		}
		b.left = n
	}
	n, err := b.Read(b.buf[:])
	if n == 0 && err != nil {
		return &transient{err: err}
	}
	b.first = b.buf[:n]
	b.left += int64(n) // not read yet by whom it is for
	return nil
}

// checkContentRange checks a Content-Range header (RFC 9110, 14.4) against what was asked for.
func checkContentRange(s string, off, n, size int64) error {
	var first, last, total int64
	if _, err := fmt.Sscanf(s, "bytes %d-%d/%d", &first, &last, &total); err != nil {
		total = size // may be unknown to the server: "*"
		if _, err := fmt.Sscanf(s, "bytes %d-%d/*", &first, &last); err != nil {
			return fmt.Errorf("asked for bytes %d to %d, and the server does not say which it sent (Content-Range: %.80q)", off, off+n-1, s)
		}
	}
	if total != size {
		return fmt.Errorf("the server has %d bytes of it, and the manifest says %d: push the image again", total, size)
	}
	if first != off || last != off+n-1 {
		return fmt.Errorf("asked for bytes %d to %d, and the server sent %d to %d", off, off+n-1, first, last)
	}
	return nil
}

func (b *body) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	var n int
	var err error
	if len(b.first) > 0 {
		n = copy(p, b.first)
		b.first = b.first[n:]
	} else {
		if b.timer == nil {
			b.timer = time.AfterFunc(b.idle, func() { b.stall.Store(true); b.cancel(errStalled) })
		} else {
			b.timer.Reset(b.idle)
		}
		n, err = b.rc.Read(p)
		b.timer.Stop()
		if err != nil && b.stall.Load() {
			err = fmt.Errorf("%w for %v", errStalled, b.idle)
		}
	}
	b.left -= int64(n)
	if b.left == 0 || err == nil {
		return n, nil
	}
	b.ended = err == io.EOF
	if b.ended {
		err = io.ErrUnexpectedEOF
	}
	b.err = err
	if b.blob != nil {
		// Where it came from may be what is broken; the next request asks who named it.
		b.blob.location.Store(nil)
		if !errors.Is(context.Cause(b.ctx), context.Canceled) { // else it was the reader who broke off
			b.blob.brokenBy(b.from)
		}
		b.err = b.blob.r.wrap(fmt.Errorf("blob %v: stream broke %d bytes before its end: %w", b.blob.digest, b.left, err))
	}
	return n, b.err
}

// Distrust says that the bytes are not the blob's, so that the next range comes from another host if there is one. The stream does not
// know: only its reader can check them.
func (b *body) Distrust() { b.blob.brokenBy(b.from) }

var errStalled = errors.New("nothing arrived")

func (b *body) Close() error {
	err := b.rc.Close()
	b.cancel(nil)
	return err
}
