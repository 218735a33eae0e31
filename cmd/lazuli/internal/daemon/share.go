package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"lazuli/convert"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

const (
	// shareEvery is how often a daemon makes a pack of one image, or tries to.
	shareEvery = time.Hour
	// shareMissed is how much a start must have wanted that its pack lacks, as a part of the pack's chunks, for another to be made.
	shareMissed = 0.02
	// shareAtMost is how long it may take to make and push one.
	shareAtMost = 10 * time.Minute
)

// A sharer puts startup packs of what the node has learned beside images, for other nodes.
type sharer struct {
	node   *rootfs.Node
	remote remote.Options
	log    *slog.Logger

	mu   sync.Mutex // held while a pack is made: it takes as much memory as the pack has bytes
	last map[v1.Hash]time.Time
}

// wanted reports whether a start has shown that its image needs another pack.
func wanted(l rootfs.Lesson) bool {
	if l.Reference.Kind() != remote.Registry {
		return false
	}
	return l.Packed == 0 || float64(l.Missed) > shareMissed*float64(l.Packed)
}

// learned makes a pack after a start that needed one, and pushes it.
func (s *sharer) learned(ctx context.Context, l rootfs.Lesson) {
	if !wanted(l) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for digest, at := range s.last {
		if time.Since(at) >= shareEvery {
			delete(s.last, digest)
		}
	}
	if _, ok := s.last[l.Digest]; ok {
		return
	}
	s.last[l.Digest] = time.Now()
	ctx, cancel := context.WithTimeout(ctx, shareAtMost)
	defer cancel()
	if err := s.push(ctx, l); err != nil && ctx.Err() == nil {
		s.log.Info("no startup pack was put beside the image: share = false keeps the daemon from trying", "image", l.Reference.String(), "err", err)
	}
}

func (s *sharer) push(ctx context.Context, l rootfs.Lesson) error {
	now, err := s.node.PackOf(ctx, l.Reference, l.Digest)
	if err != nil {
		return err
	}
	if now != l.Pack { // another node was faster; whether its pack lacks anything, the next start shows
		s.log.Debug("there is another startup pack by now", "image", l.Reference.String(), "pack", now)
		return nil
	}
	image, err := s.node.Image(ctx, l.Reference, l.Digest)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp("", "lazuli-pack-")
	if err != nil {
		return err
	}
	defer f.Close()
	os.Remove(f.Name()) // it vanishes when it is closed, however we end
	sum := sha256.New()
	report, err := l.Chain.Pack(ctx, l.Learned.Profile, 0, io.MultiWriter(f, sum))
	if err != nil {
		return err
	}
	digest := v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}
	if digest == l.Pack {
		return nil
	}
	if _, err := convert.PushPack(ctx, l.Reference, image, f, report.Size, s.remote); err != nil {
		return err
	}
	s.log.Info("a startup pack was put beside the image", "image", l.Reference.String(), "size", report.Size, "chunks", report.Chunks, "missed", l.Missed)
	return s.node.KnowPack(l.Chain, digest, io.NewSectionReader(f, 0, report.Size))
}
